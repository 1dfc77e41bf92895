"""The quantized leaf: a base kernel in 4 or 8 bits, which stands where the array would."""
