#!/bin/busybox sh
# The first process of a guest, see kernels.sh. Executed twice: in the initial file system, where
# it makes the root file system, and in that root, where it runs the command.

stop() {
    [ $# -eq 0 ] || echo "kernels-init: $*" >/dev/console
    "$busybox" sync
    "$busybox" poweroff -f
}

# ---------------------------------------------------------------- in the initial file system

# Links of the machine's root are copied, directories mounted in their places.
take_directories() { # take_directories ROOT
    for entry in "$1"/*; do
        name=${entry##*/}
        if [ -L "$entry" ]; then
            cp -P "$entry" "$name"
        elif [ -d "$entry" ]; then
            mkdir "$name"
            case $name in
            proc | sys | dev | run | tmp | mnt | media) ;;
            *) mount -o bind "$entry" "$name" ;;
            esac
        fi
    done
}

# Copies of what many small files are read from, in the places of the originals.
take_copies() { # take_copies ARCHIVE LIST
    mkdir run/copies
    dd if="$1" bs=500k 2>/dev/null | tar -x -C run/copies # each read is a look at the machine
    while read -r place; do
        mkdir -p ".$place" # it is there, unless it is below /tmp or the like
        mount -o bind "run/copies$place" ".$place"
    done <"$2"
}

make_root() {
    "$busybox" --install -s /bin
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    for module in /modules/*; do insmod "$module"; done
    mount -t tmpfs -o mode=755,size=75% root /root
    cd /root
    mkdir .host .out
    options=trans=virtio,version=9p2000.L,msize=512000
    mount -t 9p -o "ro,cache=loose,$options" host .host
    mount -t 9p -o "$options" out .out
    . /root/.out/.guest/settings
    take_directories ".host$BASE"
    mount -t tmpfs -o mode=755 run run
    chmod 1777 tmp
    take_copies .out/.guest/copies.tar .out/.guest/copies
    for place in proc sys dev; do mount -o move "/$place" "$place"; done
    cp /bin/busybox /init run/
    exec switch_root /root /run/init in-root
}

# ---------------------------------------------------------------- in the root

prepare() {
    . /.out/.guest/settings
    # The directory for modules is the machine's own, if there is one, and this is another kernel.
    printf '#!/bin/sh\nexec modprobe -d "%s" "$@"\n' "$MODULES" >/run/modprobe
    chmod 755 /run/modprobe
    echo /run/modprobe >/proc/sys/kernel/modprobe
    hostname "vm-${MODULES##*/}"
    mkdir -p /dev/pts /dev/shm /run/home
    mount -t devpts devpts /dev/pts
    mount -t tmpfs -o mode=1777 shm /dev/shm
    ln -sf /proc/self/fd /dev/fd
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    ip link set lo up
}

run_command() {
    export HOME=/run/home OUT=/.out TMPDIR=/tmp
    (
        cd "$DIRECTORY" || exit 1
        exec bash /.out/.guest/command
    ) >/.out/.guest/stdout 2>/.out/.guest/stderr </dev/null
    echo $? >/.out/.guest/status
}

if [ "$1" = in-root ]; then
    busybox=/run/busybox
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    prepare
    run_command
    stop
fi
busybox=/bin/busybox
set -e
trap stop EXIT
make_root
