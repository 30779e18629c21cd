"""Methods that adapt a trained model with a learned prefix; one file or package each."""
