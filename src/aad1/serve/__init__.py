"""Live video: steer a stream while it is made. `session` decides, `live` runs, `server` serves."""
