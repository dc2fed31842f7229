"""What the trainers share: settings and heads, and the processes that hold the parts of one patch."""
