"""What finds, watches and changes modules of a model, whatever the method."""
