"""Layer maps, recipes and checkpoints: everything between a student and its teacher."""
