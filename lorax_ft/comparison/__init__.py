"""Fair comparisons of methods: same data, order and steps, at one rate and each at its best."""
