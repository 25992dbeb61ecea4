"""Training, packing and measuring quantised networks on real data: the command line and the demo."""
