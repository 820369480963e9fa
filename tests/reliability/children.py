"""One server that processes are forked from, to be killed: it has imported all they need."""

import multiprocessing

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["pytest", "tests.reliability.warm"])
