"""Layers that models are composed of; each constructor receives its sizes and the kernel plan."""
