"""The HTTP edge: parse, call one core function, shape the answer."""
