"""Methods of pre-training and prompting for recall; one file or package each."""
