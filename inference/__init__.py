"""The offloaded runtime: experts in host memory, a budget of them resident."""
