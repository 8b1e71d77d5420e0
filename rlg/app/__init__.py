"""The app: a slider over w, in the browser."""
