"""The driver's stack runs in a node: grpc from the project's virtualenv, over a unix socket."""

import subprocess
import sys

import grpc

SERVER = """
import concurrent.futures, sys, time, grpc
handler = grpc.method_handlers_generic_handler("smoke.Echo", {"Say": grpc.unary_unary_rpc_method_handler(lambda request, context: b"heard " + request)})
server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((handler,))
server.add_insecure_port("unix:" + sys.argv[1])
server.start()
print("serving", flush=True)
server.wait_for_termination()
"""


def test_a_grpc_server_in_a_node_answers_over_its_unix_socket(nodes, tmp_path):
    socket = tmp_path / "csi.sock"
    process = nodes[0].popen([sys.executable, "-c", SERVER, str(socket)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"serving\n"
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        say = channel.unary_unary("/smoke.Echo/Say")
        assert [say(b"%d" % number, timeout=20) for number in range(50)] == [b"heard %d" % number for number in range(50)]
    process.kill()
    process.wait(10)
    process.stdout.close()
