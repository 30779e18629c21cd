"""Records, collators and tasks: what methods train and are measured on."""
