"""What layers compute, each in the form that is fastest for its shape and platform; how it acts on several seeds."""
