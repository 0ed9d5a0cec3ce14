"""The demonstration model; a package only so that `hal demo` finds it when hal is installed."""
