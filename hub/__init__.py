"""The thin hub: takes records in, sends desired state out, shows the hierarchy."""

__version__ = "0.1.0"
