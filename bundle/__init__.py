"""What training hands to serving: the manifest, its checks, and the preprocessing both sides share."""
