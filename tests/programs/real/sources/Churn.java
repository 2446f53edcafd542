import java.io.FileWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/** Threads that make garbage, keep a little of it and check what they kept; a barrier, a timer, compiled code. */
public class Churn {
    static final AtomicLong ticks = new AtomicLong();
    static final Map<Integer, Long> shared = new ConcurrentHashMap<>();

    static synchronized void wrong(String text) {
        try (FileWriter out = new FileWriter("wrong", true)) {
            out.write(text + "\n");
        } catch (Exception error) {
            error.printStackTrace();
        }
    }

    static long mix(long value) {
        for (int i = 0; i < 2000; i++) value = value * 6364136223846793005L + 1442695040888963407L;
        return value;
    }

    static void work(int number, CyclicBarrier barrier) throws Exception {
        Map<Integer, String> kept = new HashMap<>();
        long round = 0;
        long value = number;
        long expected = number;
        while (true) {
            round++;
            List<byte[]> garbage = new ArrayList<>();
            for (int i = 0; i < 200; i++) garbage.add(new byte[4096]);
            kept.put((int) (round % 1000), "round " + round + " of " + number);
            for (Map.Entry<Integer, String> entry : kept.entrySet()) {
                long of = Long.parseLong(entry.getValue().split(" ")[1]);
                if (of % 1000 != entry.getKey() || of > round || of <= round - 1000)
                    wrong("kept " + entry + " in round " + round);
            }
            value = mix(value);
            for (int i = 0; i < 2000; i++) expected = expected * 6364136223846793005L + 1442695040888963407L;
            if (value != expected) wrong("arithmetic in round " + round);
            shared.merge(number, 1L, Long::sum);
            if (shared.get(number) != round) wrong("shared map in round " + round);
            barrier.await(60, TimeUnit.SECONDS);
            Thread.sleep(2);
        }
    }

    public static void main(String[] arguments) throws Exception {
        AtomicLong rounds = new AtomicLong();
        FileWriter counts = new FileWriter("counts");
        CyclicBarrier barrier = new CyclicBarrier(4, () -> {
            try {
                counts.write(rounds.incrementAndGet() + "\n");
                counts.flush();
            } catch (Exception error) {
                wrong(error.toString());
            }
        });
        Executors.newSingleThreadScheduledExecutor(task -> {
            Thread thread = new Thread(task);
            thread.setDaemon(true);
            return thread;
        }).scheduleAtFixedRate(ticks::incrementAndGet, 0, 5, TimeUnit.MILLISECONDS);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                Files.writeString(Path.of("ended"), rounds + " rounds, " + ticks + " ticks\n");
            } catch (Exception error) {
                wrong(error.toString());
            }
        }));
        for (int i = 0; i < 4; i++) {
            int number = i;
            new Thread(() -> {
                try {
                    work(number, barrier);
                } catch (Exception error) {
                    wrong(error.toString());
                }
            }).start();
        }
    }
}
