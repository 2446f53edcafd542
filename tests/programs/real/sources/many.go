// Goroutines on several threads, channels, timers, select, a garbage collector, a child over a pipe.
package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"
)

func wrong(format string, values ...any) {
	file, _ := os.OpenFile("wrong", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	fmt.Fprintf(file, format+"\n", values...)
	file.Close()
}

func main() {
	runtime.GOMAXPROCS(4)
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	counts, _ := os.Create("counts")

	cat := exec.Command("cat")
	in, _ := cat.StdinPipe()
	out, _ := cat.StdoutPipe()
	if err := cat.Start(); err != nil {
		wrong("cat: %v", err)
	}
	lines := bufio.NewScanner(out)

	// a ring of 1,000 goroutines hands a number round, each adds one
	first := make(chan int)
	last := first
	for i := 0; i < 1000; i++ {
		next := make(chan int)
		go func(from, to chan int) {
			for n := range from {
				to <- n + 1
			}
		}(last, next)
		last = next
	}
	ticker := time.NewTicker(5 * time.Millisecond)
	for round := 1; ; round++ {
		var group sync.WaitGroup
		sums := make([][32]byte, 8)
		for i := range sums {
			group.Add(1)
			go func(i int) {
				defer group.Done()
				data := make([]byte, 1<<16)
				for j := range data {
					data[j] = byte(i + j + round)
				}
				sums[i] = sha256.Sum256(data)
			}(i)
		}
		first <- round
		if n := <-last; n != round+1000 {
			wrong("the ring says %d in round %d", n, round)
		}
		group.Wait()
		for i, sum := range sums {
			data := make([]byte, 1<<16)
			for j := range data {
				data[j] = byte(i + j + round)
			}
			if sum != sha256.Sum256(data) {
				wrong("sum %d of round %d", i, round)
			}
		}
		fmt.Fprintln(in, round)
		if !lines.Scan() || lines.Text() != fmt.Sprint(round) {
			wrong("the child says %q in round %d", lines.Text(), round)
		}
		fmt.Fprintln(counts, round)
		select {
		case <-ended:
			in.Close()
			cat.Wait()
			return
		case <-ticker.C:
		}
	}
}
