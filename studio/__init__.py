"""The web page: prepare images, train, watch, generate. Its server never imports PyTorch."""
