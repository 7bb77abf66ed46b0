"""One small app for each server beside ours, and what each needs installed."""
