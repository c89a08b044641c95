package mux

import (
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// Messages beside bulk are a crowd, soon after the first and until soon after the last of
// them. Neither alone is one, however many there are.
func TestCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 10 << 20
		c1, c2 := newLine(lineConfig{rate: rate, room: 64 << 10})
		client, server := sessionPair(t, c1, c2, Config{})
		bulk, bulkIn := streamPair(t, client, server)
		talk, talkIn := streamPair(t, client, server)
		go io.Copy(io.Discard, bulkIn)
		go io.Copy(io.Discard, talkIn)
		crowd := func() bool {
			client.out.mu.Lock()
			defer client.out.mu.Unlock()
			return client.out.crowd.here
		}
		check := func(when string, want bool) {
			t.Helper()
			if got := crowd(); got != want {
				t.Errorf("%s: a crowd is %v, want %v", when, got, want)
			}
		}
		// do has messages, bulk or both leave for a while.
		do := func(messages, large bool) {
			t.Helper()
			for range 50 {
				if large {
					if _, err := bulk.Write(make([]byte, rate/100)); err != nil {
						t.Fatal(err)
					}
				}
				for range 2 {
					if !messages {
						break
					}
					if _, err := talk.Write(make([]byte, 64)); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
		do(true, false)
		check("messages", false)
		do(false, true)
		check("bulk", false)
		do(true, true)
		check("both", true)
		do(false, true)
		check("bulk again", false)
		do(true, true)
		check("both again", true)
		do(true, false)
		check("messages again", false)
	})
}

// What counts is how often messages leave, also when nobody has looked for long. The small
// end of what was read at once is no message.
func TestCrowdCounts(t *testing.T) {
	var talk, download Stream
	begin := time.Now()
	for _, test := range []struct {
		name     string
		after    time.Duration
		messages int
		bulk     bool
		ends     int // of bulk
		want     bool
	}{
		{"few messages", crowdTurn, leastMessages - 1, true, 0, false},
		{"enough", crowdTurn, leastMessages, true, 0, true},
		{"no bulk", crowdTurn, leastMessages, false, 0, false},
		{"enough, but in too long", 2 * crowdTurn, leastMessages, true, 0, false},
		{"enough for long", 2 * crowdTurn, 2 * leastMessages, true, 0, true},
		{"ends of bulk", crowdTurn, 0, true, leastMessages, false},
	} {
		c := crowd{since: begin}
		for range test.messages {
			c.small(&talk)
		}
		if test.bulk {
			c.large(&download)
		}
		for range test.ends {
			c.large(&download)
			c.small(&download)
		}
		if changed := c.look(begin.Add(test.after)); changed != test.want || c.here != test.want {
			t.Errorf("%s: a crowd is %v (changed: %v), want %v", test.name, c.here, changed, test.want)
		}
	}
	c := crowd{here: true, since: begin}
	if c.look(begin.Add(crowdTurn-1)) || !c.here {
		t.Error("it was looked at before it was time")
	}
	if !c.look(begin.Add(crowdTurn)) || c.here {
		t.Error("a crowd does not go")
	}
}
