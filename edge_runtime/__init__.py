"""NovaCron edge runtime: senses, decides, acts and remembers on one device, gateway or host."""

__version__ = "0.1.0"
