"""The serving room: what is loaded, how it comes and goes, and how requests are answered."""
