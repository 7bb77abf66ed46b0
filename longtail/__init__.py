"""The statistics of long-tailed classification: NumPy and SciPy, arrays in, arrays out."""
