"""Sound: files, mel spectrograms, Griffin-Lim and neural vocoders."""
