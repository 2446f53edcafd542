# A dozen tools at work side by side, each in a loop that checks what it made and counts its rounds in count.NAME.
# What is wrong goes to "wrong". SIGTERM: each ends its round, then all are gone.
set -u
wrong() { echo "$1" >> wrong; }
count() { echo "$2" > "count.$1.new" && mv "count.$1.new" "count.$1"; }

# a tree of files that is the same all the time
mkdir -p source && for n in $(seq 40); do seq $((n * 100)) $((n * 100 + 3000)) > "source/file$n"; done
sum=$(cat source/* | sha256sum)

archive() {
  n=0
  while [ ! -e stop ]; do
    tar -cf - source | gzip -1 | gunzip | (rm -rf unpacked && mkdir unpacked && tar -xf - -C unpacked) || wrong "tar $n"
    [ "$(cat unpacked/source/* | sha256sum)" = "$sum" ] || wrong "archive $n"
    n=$((n + 1)); count archive $n
  done
}

mirror() {
  n=0
  while [ ! -e stop ]; do
    rm -rf mirrored; rsync -a --bwlimit=20000 source/ mirrored/ || wrong "rsync $n"
    [ "$(cat mirrored/* | sha256sum)" = "$sum" ] || wrong "mirror $n"
    n=$((n + 1)); count mirror $n
  done
}

build() {
  mkdir -p built
  cat > built/Makefile <<'END'
all: $(foreach n,1 2 3 4 5 6 7 8,out$(n)) ; cat $^ > all
out%: ; @sleep 0.02; seq $* 100 | sort -n | tail -n 1 > $@
END
  n=0
  while [ ! -e stop ]; do
    rm -f built/out* built/all
    make -s -j2 -C built > /dev/null || wrong "make $n"
    [ "$(sort -u built/all)" = 100 ] && [ "$(wc -l < built/all)" = 8 ] || wrong "build $n"
    n=$((n + 1)); count build $n
  done
}

box() {
  exec busybox sh -c '
    n=0
    while [ ! -e stop ]; do
      [ "$(echo $n | busybox sed s/^/x/ | busybox tr x y)" = y$n ] || echo "busybox $n" >> wrong
      n=$((n + 1)); echo $n > count.box.new; busybox mv count.box.new count.box
      busybox usleep 10000
    done'
}

camel() {
  exec perl -e '
    $| = 1; my %seen; my $n = 0; local $SIG{ALRM} = sub { $alarms++; alarm 1 }; alarm 1;
    open(my $out, "|-", "cat > perl.out") or die;
    while (! -e "stop") {
      $seen{$_ % 1000} = $_ for ($n * 100 .. $n * 100 + 99);
      print $out "$n\n";
      my $said = `echo $n`; chomp $said;
      if ($said != $n) { open(my $w, ">>", "wrong"); print $w "perl $n: $said\n" }
      $n++; open(my $c, ">", "count.camel.new"); print $c "$n\n"; close $c; rename "count.camel.new", "count.camel";
      select(undef, undef, undef, 0.01);
    }
    close $out;'
}

database() {
  # the command line reads statements from a pipe and keeps its transaction open meanwhile
  coproc DB { exec sqlite3 -batch base.db; }
  echo 'PRAGMA journal_mode=wal; CREATE TABLE t (n INTEGER PRIMARY KEY, s TEXT);' >&"${DB[1]}"
  read -r mode <&"${DB[0]}"; [ "$mode" = wal ] || wrong "journal $mode"
  n=0
  while [ ! -e stop ]; do
    echo "BEGIN; INSERT INTO t VALUES ($n, hex(randomblob(200))); SELECT count(*) FROM t; COMMIT;" >&"${DB[1]}"
    read -r rows <&"${DB[0]}"
    n=$((n + 1))
    [ "$rows" = $n ] || wrong "sqlite has $rows rows instead of $n"
    count database $n
  done
  echo 'PRAGMA integrity_check;' >&"${DB[1]}"
  read -r state <&"${DB[0]}"; [ "$state" = ok ] || wrong "sqlite: $state"
  eval "exec ${DB[1]}>&-"; wait
}

trap ': > stop; wait; : > ended; exit 0' TERM
archive & mirror & build & box & camel & database &
while true; do wait; done
