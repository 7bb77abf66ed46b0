"""The tables and figures of Menon et al. (2021), each by its name: `python -m training.paper NAME`."""
