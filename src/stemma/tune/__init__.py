"""Methods that adapt a trained model, one file each."""
