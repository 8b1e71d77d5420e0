"""App in the browser: a slider over w."""
