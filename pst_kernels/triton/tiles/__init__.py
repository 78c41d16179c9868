"""Which tile a kernel runs with: tables by architecture, dtype and shape bucket, and the choice among them."""
