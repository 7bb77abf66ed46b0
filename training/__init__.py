"""Data, loss, network, checkpoint, bundle: the side of Tare that needs torch."""
