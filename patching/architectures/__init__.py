"""What architectures differ in, and how their models are built and loaded."""
