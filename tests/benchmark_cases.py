"""Small benchmarks in the file formats of MMLU, C-Eval and CMMLU, written as their authors do."""

from __future__ import annotations

from pathlib import Path

# Two subjects of different categories, with dev rows and questions.
MMLU = {
    "dev/astronomy_dev.csv": 'How many moons has Mars?,0,1,2,3,C\n"Which planet, by size, is '
    'third?",Saturn,Uranus,Mars,Earth,B\n',
    "dev/philosophy_dev.csv": "Who wrote the Republic?,Plato,Kant,Hume,Locke,A\n"
    "Who wrote the Critique?,Plato,Kant,Hume,Locke,B\n",
    "test/astronomy_test.csv": "Which star is nearest?,Sirius,Vega,the Sun,Rigel,C\n"
    "What is Io?,a moon,a star,a comet,a planet,A\n"
    "Which is the hottest?,Venus,Earth,Mars,Pluto,A\n",
    "test/philosophy_test.csv": "Who doubted all?,Descartes,Mill,Bentham,Rawls,A\n",
    "val/astronomy_val.csv": "What is Vega?,a moon,a star,a comet,a planet,B\n",
    "val/philosophy_val.csv": "Who taught Plato?,Zeno,Kant,Socrates,Mill,C\n",
}
CEVAL = {
    "dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n"
    '0,"法律的作用，包括____",规范作用,社会作用,两者,都不是,C,"解释，\n两行"\n',
    "dev/college_physics_dev.csv": "id,question,A,B,C,D,answer,explanation\n"
    "0,光速约为____,3e8,3e6,3e5,3e4,A,定义\n",
    "val/law_val.csv": "id,question,A,B,C,D,answer\n0,宪法是____,根本法,民法,刑法,商法,A\n",
    "val/college_physics_val.csv": "id,question,A,B,C,D,answer\n0,力的单位是____,焦,牛,瓦,帕,B\n",
    "test/law_test.csv": "id,question,A,B,C,D\n0,民法调整____,甲,乙,丙,丁\n",
}
CMMLU = {
    "dev/agronomy.csv": ",Question,A,B,C,D,Answer\n0,土壤是,甲,乙,丙,丁,D\n"
    "1,水稻是,一,二,三,四,B\n",
    "dev/virology.csv": ",Question,A,B,C,D,Answer\n0,病毒是,甲,乙,丙,丁,A\n"
    "1,噬菌体是,一,二,三,四,C\n",
    "test/agronomy.csv": ",Question,A,B,C,D,Answer\n0,小麦是,甲,乙,丙,丁,A\n"
    "1,玉米是,子,丑,寅,卯,C\n",
    "test/virology.csv": ",Question,A,B,C,D,Answer\n0,流感是,甲,乙,丙,丁,B\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    """The folder with the files of a benchmark."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder
