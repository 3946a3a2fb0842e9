"""`rushes bench`: what a service does under load, what its engines need alone, and what the peers do.

`load` sends requests and follows each one; `viewer` and `statistics` say what came of them; `calls` replays the engine
calls that a video needs without anything around them; `peers` runs diffusers' pipeline; `suite` puts them side by side.
"""
