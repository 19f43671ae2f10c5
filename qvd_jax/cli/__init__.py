"""What all commands share: their arguments, inputs, devices and hosts, and how they end."""
