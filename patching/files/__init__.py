"""Files that library and command lines share: outputs, texts, plots."""
