"""The daemon's side of the channel: admission, requests, and the drivers of its connections."""
