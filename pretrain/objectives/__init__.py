"""One objective a file: a class that is called with a `StudentState` and returns named losses; the first name is the loss itself."""
