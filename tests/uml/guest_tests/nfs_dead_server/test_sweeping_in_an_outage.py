"""The sweeper while a server is away: it waits for that one, and the pools of the others are swept as ever."""

import os
import time

from driver_in_guest import Cluster, pool_of

ENTRIES, FILES = 40, 60
SWEPT_SECONDS = 25


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come about within {seconds} s"
        time.sleep(0.1)


def test_the_trash_of_one_server_is_emptied_while_another_is_away_with_much_of_it(network, make_server):
    away, stays = make_server("away"), make_server("stays")
    servers = {"away": away, "stays": stays}
    for name, server in servers.items():
        server.export(server.filesystem("xfs", name=name))
    pools = [pool_of(server, f"/srv/{name}", name) for name, server in servers.items()]
    trash = {name: server.tree(f"/srv/{name}/.csi/trash") for name, server in servers.items()}
    with Cluster(network, pools, nodes=0) as cluster:
        cluster.create("first", pool="away")  # its share is mounted
        volumes = [cluster.create(f"v{number}", pool="stays") for number in range(2)]
        away.delay(10)
        for number in range(ENTRIES):
            entry = trash["away"] / f"{'a' * 26}.{number:016x}"
            entry.mkdir()
            for name in range(FILES):
                (entry / str(name)).touch()
        until(lambda: len(os.listdir(trash["away"])) <= ENTRIES - 3, 90)
        away.freeze()
        left = len(os.listdir(trash["away"]))
        assert left > ENTRIES / 2

        began = time.monotonic()
        cluster.delete(volumes[0])
        until(lambda: not os.listdir(trash["stays"]), SWEPT_SECONDS)
        print(f"with {left} entries in the trash of a dead server, another's was empty after {time.monotonic() - began:.1f} s")

        cluster.controller.kill()
        began = time.monotonic()
        cluster.controller.start()
        print(f"a controller that starts meanwhile serves after {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        cluster.delete(volumes[1])
        until(lambda: not os.listdir(trash["stays"]), SWEPT_SECONDS)
        print(f"and empties the trash of the other server after {time.monotonic() - began:.1f} s")
        assert len(os.listdir(trash["away"])) == left

        away.delay(0)
        away.thaw()
        until(lambda: not os.listdir(trash["away"]), 180)
        cluster.controller.stop()
