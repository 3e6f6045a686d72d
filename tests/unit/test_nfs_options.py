"""NFS mount options: what is known, what is refused, and which source wins."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import InvalidArgument
from csi_driver.linux import nfs_options
from csi_driver.linux.nfs_options import (
    bind_attributes,
    join_options,
    parse_nfs_options,
    render_options,
    share_options,
    volume_options,
)

FIELD = "flags"
GOOD = [
    "vers=4.2", "nfsvers=3", "hard", "soft", "softerr", "timeo=600", "retrans=2", "nconnect=16", "sec=krb5p", "sec=krb5:krb5i", "xprtsec=mtls",
    "rsize=1048576", "actimeo=0", "noac", "nolock", "local_lock=flock", "proto=rdma", "rdirplus", "nordirplus", "fsc", "fsc=tag", "lookupcache=pos",
    "ro", "nosuid", "noatime", "rw", "suid", "sync", "nocto", "noresvport",
]  # fmt: skip
BAD = [
    "vers=5", "vers=", "vers", "nconnect=17", "nconnect=0", "nconnect=1e1", "nconnect= 1", "nconnect=٣", "sec=krb9", "sec=sys:", "xprtsec=ssl",
    "rsize=1m", "timeo=0", "timeo=-1", "timeo=00", "hard=1", "ro=yes", "HARD", "Vers=4.2", "", "=", "=4", "vers=4.2=4.1", "vers=4.2,addr=1.2.3.4",
    "hard addr=1.2.3.4", "hard\naddr=1.2.3.4", "fsc=../../etc", "fsc=", "-o", "--bind", "a" * 4096, "vers=" + "4" * 4096, "h\u0430rd", "hard\0", "vers=4.2\n",
]  # fmt: skip
REDIRECTS = [
    "addr=10.0.0.9",
    "mountaddr=10.0.0.9",
    "mounthost=evil",
    "source=evil:/",
    "bind",
    "remount",
    "bg",
    "retry=10000",
    "sharecache",
]


def text(*words, **source):
    return render_options(parse_nfs_options(words, FIELD, **source))


@pytest.mark.parametrize("word", GOOD)
def test_a_known_option_is_taken(word):
    assert text(word) == word


@pytest.mark.parametrize("word", BAD)
def test_what_is_no_option_or_has_no_such_value_is_refused_with_its_place(word):
    with pytest.raises(InvalidArgument, match=r"flags\[1\]"):
        parse_nfs_options(["hard", word], FIELD)


@pytest.mark.parametrize("word", REDIRECTS)
@pytest.mark.parametrize("of_pool", [True, False])
def test_an_option_that_leads_elsewhere_or_hides_a_failure_is_refused_from_everybody(word, of_pool):
    with pytest.raises(InvalidArgument, match="not allowed"):
        parse_nfs_options([word], FIELD, of_pool=of_pool)


@pytest.mark.parametrize("word", ["port=2050", "mountport=20048", "clientaddr=10.0.0.7"])
def test_only_a_pool_says_to_which_port_of_its_server(word):
    assert text(word, of_pool=True) == word
    with pytest.raises(InvalidArgument, match="only the pool"):
        parse_nfs_options([word], FIELD)


@pytest.mark.parametrize(
    ("typo", "meant"), [("hrad", "hard"), ("nconect=4", "nconnect"), ("nfsver=4.2", "nfsvers"), ("xprtsc=tls", "xprtsec")]
)
def test_a_typo_is_answered_with_what_was_probably_meant(typo, meant):
    with pytest.raises(InvalidArgument, match=f"did you mean `{meant}`"):
        parse_nfs_options([typo], FIELD)


@pytest.mark.parametrize(
    "words", [["hard", "soft"], ["vers=4.1", "nfsvers=4.2"], ["ro", "rw"], ["nosuid", "suid"], ["timeo=1", "timeo=2"]]
)
def test_two_words_of_one_source_that_contradict_each_other_are_refused(words):
    with pytest.raises(InvalidArgument, match=r"flags\[1\].*contradicts"):
        parse_nfs_options(words, FIELD)


def test_a_word_may_be_said_twice():
    assert text("hard", "hard") == "hard"


def test_a_later_source_wins_over_an_earlier_one_and_each_kind_is_there_once():
    pool = parse_nfs_options(["vers=4.2", "hard", "timeo=600", "nconnect=4"], FIELD, of_pool=True)
    of_class = parse_nfs_options(["nfsvers=4.1", "soft"], FIELD)
    volume = parse_nfs_options(["softerr", "ro"], FIELD)
    assert render_options(join_options(pool, of_class, volume)) == "timeo=600,nconnect=4,nfsvers=4.1,softerr,ro"


@pytest.mark.parametrize(
    ("forbids", "allows"), [("nosuid", "suid"), ("nodev", "dev"), ("noexec", "exec"), ("ro", "rw"), ("noatime", "atime")]
)
def test_what_a_pool_forbids_no_class_allows_again(forbids, allows):
    joined = join_options(parse_nfs_options([forbids], FIELD), parse_nfs_options([allows], FIELD))
    assert render_options(joined) == forbids


@pytest.mark.parametrize("word", ["sec=hunter2", "password=hunter2", "vers=hunter2", "hunter2=x,hunter3"])
def test_a_value_is_never_repeated_in_a_message(word):
    with pytest.raises(InvalidArgument) as refused:
        parse_nfs_options([word], FIELD)
    assert word.partition("=")[2] not in str(refused.value)


def test_the_controllers_share_gives_up_and_sees_what_others_make_whatever_the_pool_says():
    pool = [
        "hard",
        "timeo=6000",
        "ro",
        "noac",
        "actimeo=60",
        "lookupcache=all",
        "vers=4.2",
        "sec=krb5",
        "nconnect=4",
        "fsc",
        "nocto",
    ]
    pool.append("local_lock=all")
    options = render_options(share_options(parse_nfs_options(pool, FIELD, of_pool=True))).split(",")
    assert {"softerr", "timeo=100", "retrans=2", "lookupcache=positive", "acdirmax=0", "nosuid", "nodev"} <= set(options)
    assert {"vers=4.2", "sec=krb5", "nconnect=4"} <= set(options)
    assert not {"hard", "ro", "noac", "actimeo=60", "lookupcache=all", "timeo=6000", "fsc", "nocto", "local_lock=all"} & set(
        options
    )


def test_each_volume_of_a_share_has_a_superblock_of_its_own_whatever_pool_and_class_say():
    pool, flags = parse_nfs_options(["vers=4.2", "hard"], "pool"), parse_nfs_options(["soft", "nosharecache"], FIELD)
    assert render_options(volume_options(pool, flags)) == "vers=4.2,soft,nosharecache"
    assert render_options(volume_options((), ())) == "nosharecache"


def test_a_bind_gets_what_of_the_flags_a_bind_can_have():
    assert bind_attributes(["vers=4.2", "hard", "noexec", "nosuid", "noatime"], FIELD).words() == {
        "noexec",
        "nosuid",
        "noatime",
    }


@given(st.lists(st.sampled_from(GOOD), max_size=8), st.lists(st.sampled_from(GOOD), max_size=8))
def test_joined_options_are_known_ones_each_kind_once(first, second):
    def parsed(words):
        taken = []
        for word in words:
            try:
                taken = list(parse_nfs_options([*map(str, taken), word], FIELD))
            except InvalidArgument:
                continue
        return taken

    joined = join_options(parsed(first), parsed(second))
    assert len({option.kind for option in joined}) == len(joined)
    assert {str(option) for option in joined} <= set(first) | set(second)
    for option in parsed(second):
        assert option in joined or option.name in nfs_options._DEFAULTS


@given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=40) | st.text(alphabet=string.printable, max_size=40))
def test_whatever_is_taken_is_one_option_and_cannot_become_two(word):
    for of_pool in (True, False):
        try:
            (option,) = parse_nfs_options([word], FIELD, of_pool=of_pool)
        except InvalidArgument:
            continue
        assert str(option) == word
        assert not set(word) & set(",\"'`\\ \t\n\r\0")
        assert not word.startswith("-")
        assert option.name not in ("addr", "mountaddr", "mounthost", "source")
