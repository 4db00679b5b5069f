"""Orders of patching found by measurement, and the layers to keep."""
