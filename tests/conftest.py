"""What every test can rely on."""

import signal

# A shell starts background jobs with SIGINT ignored, and programs started from there would ignore it as well: then no
# test of Ctrl-C could pass. A handler set here is the default again in every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
