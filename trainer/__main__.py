"""Where the command begins. Ctrl-C while its modules are imported ends it, too, without a traceback."""

import signal
import sys


def main() -> int:
    # Whoever started it may have had it ignored.
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if mine:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from trainer import cli

    if mine:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
