"""Methods of serving that reuse or compress the keys and values of prefixes; one file or package each."""
