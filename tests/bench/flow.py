"""A flow of small UDP datagrams, for tests/bench/kernel.

flow.py send FROM TO SECONDS: one each two milliseconds; prints how many.
flow.py receive AT: until none has come for three seconds; prints how many came and the longest silence in milliseconds.
"""
import socket
import sys
import time

PORT = 9000
flow = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if sys.argv[1] == "send":
    flow.bind((sys.argv[2], 0))
    sent, end = 0, time.monotonic() + float(sys.argv[4])
    while time.monotonic() < end:
        flow.sendto(sent.to_bytes(4, "big"), (sys.argv[3], PORT))
        sent += 1
        time.sleep(0.002)
    print(sent)
else:
    flow.bind((sys.argv[2], PORT))
    flow.settimeout(30)
    numbers, silence, last = set(), 0.0, None
    try:
        while True:
            numbers.add(flow.recv(100))
            now = time.monotonic()
            silence = max(silence, now - last) if last else 0.0
            last = now
            flow.settimeout(3)
    except socket.timeout:
        print(len(numbers), silence * 1e3)
