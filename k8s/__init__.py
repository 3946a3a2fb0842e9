"""What the chart is made of that isn't written by hand: `python -m k8s.render`."""
