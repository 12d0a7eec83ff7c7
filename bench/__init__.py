"""The figures Headwater promises, each measured beside its ceiling and its peers in the same run: `python -m bench core.1`."""
