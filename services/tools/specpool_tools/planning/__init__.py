"""Planning past one machine: a discrete-event simulation of targets and a speculator, and what it says about pools."""
