"""What an answer depends on beside the input: constants, values that code keeps, and what a plan is made for."""
