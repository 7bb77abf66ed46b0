"""Side-by-side measurements: ours against what others would do, in one run on one machine."""
